"""The importance of groups."""
