"""Figures of results. Each function returns the axes that it drew on."""
