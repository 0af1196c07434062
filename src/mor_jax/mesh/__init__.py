"""Devices: mesh axes and meshes of them, processes of several hosts, and what a device can do."""
