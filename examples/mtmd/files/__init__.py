"""Files in and out: read with distrust, written so that a kill leaves them whole."""
