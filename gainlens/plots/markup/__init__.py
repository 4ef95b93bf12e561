"""Figures as inline SVG, coloured by classes: the style sheet decides light, dark and print."""
