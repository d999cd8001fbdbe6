"""Folders from strangers: what a compressed checkpoint says about itself is checked before it is believed."""
