"""The web workbench: pages over `api`, each user's own workspace, and the walls around both."""
