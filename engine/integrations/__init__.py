"""The engine inside other programs: each module is one of them, and is imported by those who have it."""
