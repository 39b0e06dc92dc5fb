"""The bench `growth`: measures how request latencies and the start time change as the store grows."""
