"""From a behaviour log to what later stages read: partitions, splits, requests and pairs."""
