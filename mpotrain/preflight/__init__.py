"""The check of every node before a long job: hardware, disks, clocks, versions, network."""
