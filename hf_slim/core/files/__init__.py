"""Files from strangers: checked before anything is allocated for them. Needs the standard library only."""
