# lcpt on NVIDIA GPUs, with the versions of constraints.txt. It has not been built or run by the authors yet.
#
#     docker build --build-arg LCPT_COMMIT=$(git rev-parse HEAD) -t lcpt .
#     docker run --gpus all --ipc=host -v $PWD/data/prepared:/lcpt/data/prepared -v $PWD/runs:/lcpt/runs lcpt \
#         deepspeed launch/pretrain.py --config configs/gpt2-small-32k.yaml run.dir=runs/mine
#
# PyTorch's wheels bring the CUDA libraries: the host needs NVIDIA's driver and container toolkit alone.
FROM python:3.11-slim

# Triton and torch.compile build a small C or C++ library on each machine before its first kernel.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /lcpt
COPY constraints.txt ./
RUN pip install -c constraints.txt torch triton
COPY . .
RUN pip install -c constraints.txt -e ./kernels -e .

# Files in mounted folders belong to this user; docker run --user takes another.
RUN useradd --create-home --uid 1000 lcpt && mkdir -p data/prepared runs && chown lcpt data/prepared runs
USER lcpt

ARG LCPT_COMMIT
ENV LCPT_COMMIT=$LCPT_COMMIT
CMD ["python", "launch/pretrain.py", "--help"]
