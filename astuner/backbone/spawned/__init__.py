"""What backbones share that train in processes of their own, below the launcher.

The files by which they and the launcher talk, the child and its guard, signs of life,
stacks, and what is told of their failure. Knows how Ray is started and what its logs look
like, without importing it; knows no trainer.
"""
