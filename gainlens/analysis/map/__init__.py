"""The coordinate map: do layers share key dimensions? One file an idea."""
