"""Words that make a training tiny."""

TINY = [
    "network.channels=[16,16]",
    "network.norm_groups=8",
    "network.layers=1",
    "network.attention=[]",
    "network.head_dim=8",
    "optim.decay=none",
    "data.labels=false",
    "trainer.progress=false",
]
