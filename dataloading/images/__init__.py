"""Images as shops have them: opened, turned upright, in sRGB, or refused with a reason."""
