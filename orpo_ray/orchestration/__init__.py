"""A sweep on Ray: its processes, worker groups and the broker between them."""
