"""placeholder until the planner's file is merged"""


def least_slice(model):
    return 2 * model.attention.block_size


def check_slices(config, world):
    pass
