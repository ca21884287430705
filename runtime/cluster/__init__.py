"""What a person writes about a cluster, read and checked: the cluster file, topologies, and plans made from them.

Knows files and models' sizes; knows nothing of Ray, torch or running processes.
"""
