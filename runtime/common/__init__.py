"""Shared by all rooms: reading and writing files, the hub, checks of arguments."""
