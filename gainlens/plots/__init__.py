"""Figures of results; each function returns the axes that it drew on."""
