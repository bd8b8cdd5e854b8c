"""Programs that show jgn at work."""
