"""The coordinate map: do layers share key dimensions?"""
