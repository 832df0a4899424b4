"""What a step moves, counted: the figures that benchmarks/step_traffic.py prints."""


def test_what_a_step_of_the_small_config_moves(call_program):
    code, said, _ = call_program(
        "benchmarks/step_traffic.py", "--config", "configs/gpt2-small-8k.yaml", "training.micro_batch=1"
    )
    assert code == 0 and said.startswith("1 x 8,192 tokens, bf16")
    parts = {line.split()[0]: (float(line.split()[1]), int(line.split()[3])) for line in said.splitlines()[1:]}
    assert parts["loss"][0] < 3 and parts["loss"][1] < 20  # 17.3 GB in 96 operators, chunk by chunk in PyTorch
    assert parts["blocks"][0] < 21 and parts["blocks"][1] < 720  # 25.5 GB in 769 with norms and gates in PyTorch


def test_a_wrong_config_is_one_line(call_program):
    code, _, errors = call_program("benchmarks/step_traffic.py", "--config", "none.yaml")
    assert code == 2 and errors.startswith("error: there is no config file")
