"""Messages to tokens and back; see `protocol` for the seam."""
