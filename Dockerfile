# For a node of H100s: CUDA's compiler builds the kernels for sm_90 against the torch that is installed.
#   docker build -t rime-fast .
#   docker run --gpus all --ipc=host -v $PWD:/data rime-fast doctor
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-dev python3-venv g++ \
    && rm -rf /var/lib/apt/lists/*
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1
RUN python3 -m venv $VIRTUAL_ENV
WORKDIR /opt/rime-fast
COPY constraints.txt .
RUN pip install -c constraints.txt torch setuptools wheel cmake ninja
COPY . .
RUN RIME_FAST_BUILD=1 RIME_FAST_CUDA=1 RIME_FAST_CUDA_ARCHS=90a pip install -c constraints.txt --no-build-isolation ".[peft,deepspeed,video,serve]"
WORKDIR /data
ENTRYPOINT ["rime-fast"]
