# tokcomp on the CPU:   docker build -t tokcomp .
# with CUDA kernels:    docker build -t tokcomp-cuda --build-arg BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04 \
#                           --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 --build-arg CUDA=1 .
# The kernels and the torch that they are built against are in one image; docker run --gpus all for the second.
ARG BASE=ubuntu:24.04
FROM ${BASE}
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG CUDA=0
ARG CUDA_ARCHITECTURES="8.0;9.0+PTX"
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/tokcomp
ENV PATH=/opt/tokcomp/bin:$PATH
RUN pip install --no-cache-dir torch torchvision --index-url ${TORCH_INDEX}
COPY . /src
# Kernels of every CPU level: the image runs on other machines than the one that builds it.
RUN TOKCOMP_BUILD_CUDA=${CUDA} TORCH_CUDA_ARCH_LIST=${CUDA_ARCHITECTURES} TOKCOMP_CPU_ARCH=dispatch \
    pip install --no-cache-dir '/src[demo]' && tokcomp info
RUN useradd --create-home tokcomp
USER tokcomp
WORKDIR /home/tokcomp
ENTRYPOINT ["tokcomp"]
CMD ["--help"]
