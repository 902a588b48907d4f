"""Entry points for `ray job submit`, and the demo: a few lines each, they call the engine."""
