"""Networks, one file each: a class of settings named after the file, with `build()`. A new network is a new file."""
