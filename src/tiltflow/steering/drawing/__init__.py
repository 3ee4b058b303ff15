"""What all kinds of steering share: samples and rewards of a condition, and the loop over conditions."""
