"""A small game of Werewolf: several agents, one of which is trained."""
