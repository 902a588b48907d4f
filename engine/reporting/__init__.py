"""An output as one page to look at: what ran and how fast, the texts, the rejects, the vectors."""
