"""The `verl` backbone: verl's own trainer over Ray, through its public doors only.

`run` is the launcher's half, `driver` verl's; they speak through files (`spawned.files`). Nothing
here is imported by the other backbones.
"""
