"""Files that train on the device."""
