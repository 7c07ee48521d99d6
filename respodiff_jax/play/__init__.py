"""The page of `respodiff play`: pictures before and after, side by side, from the same noise."""
