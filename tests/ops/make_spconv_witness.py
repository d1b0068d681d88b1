"""What spconv's CPU build computes for a few voxels, as JSON: tests/ops/spconv_witness.json.

Made with spconv 2.3.8, torch 2.13.0 and one thread (with two its index is wrong now and then):

    python tests/ops/make_spconv_witness.py > tests/ops/spconv_witness.json

All numbers are small whole ones, so every sum is exact and results can be compared bit for bit.
"""

import json

import torch

SHAPE, BATCH, CHANNELS = (6, 5, 7), 3, (3, 4)
LAYERS = {
    "SubMConv3d": [{"kernel_size": 3}, {"kernel_size": 3, "dilation": 2}, {"kernel_size": 5}],
    "SparseConv3d": [
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": 2, "stride": 2},
        {"kernel_size": 3, "stride": 2, "padding": 2, "dilation": 2},
    ],
}


def main():
    import spconv.pytorch as spconv

    torch.set_num_threads(1)
    random = torch.Generator().manual_seed(0)

    def whole(*shape):
        return torch.randint(-2, 3, shape, generator=random).float()

    active = torch.rand((BATCH, *SHAPE), generator=random) < 0.15
    active[1] = False  # a sample without voxels
    places = active.nonzero().int()
    places = places[torch.randperm(len(places), generator=random)].contiguous()
    x = spconv.SparseConvTensor(whole(len(places), CHANNELS[0]), places, list(SHAPE), BATCH)
    found = []

    def run(name, module, given, **options):
        module.weight.data = whole(*module.weight.shape)
        module.bias.data = whole(*module.bias.shape)
        y = module(given)
        values = {"coordinates": y.indices, "features": y.features}
        values |= {"weight": module.weight, "bias": module.bias}
        whole_numbers = {key: value.int().tolist() for key, value in values.items()}
        about = {"layer": name, "options": options, "spatial_shape": y.spatial_shape}
        found.append(about | whole_numbers)
        return y

    for name, cases in LAYERS.items():
        for number, options in enumerate(cases):
            key = f"{name}{number}"
            y = run(name, getattr(spconv, name)(*CHANNELS, indice_key=key, **options), x, **options)
    back = {"kernel_size": options["kernel_size"], "indice_key": key}
    run("SparseInverseConv3d", spconv.SparseInverseConv3d(*CHANNELS[::-1], **back), y, **options)
    sites = {"spatial_shape": SHAPE, "batch_size": BATCH, "coordinates": places.tolist()}
    print(json.dumps(sites | {"features": x.features.int().tolist(), "layers": found}))


if __name__ == "__main__":
    main()
