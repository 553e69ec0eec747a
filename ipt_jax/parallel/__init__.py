"""Devices: processes, meshes, and the one table that maps logical axes to mesh axes."""
