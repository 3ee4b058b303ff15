"""What utilities share: what is known of a law, first variations, weighted estimates, scores, transport."""
