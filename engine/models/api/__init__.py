"""Models behind an API: what all of them share, from the tokens of a text to the checks of an answer."""
