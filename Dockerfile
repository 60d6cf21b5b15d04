# The checkout with its environment, for CPUs, NVIDIA GPUs or TPUs:
#   docker build --build-arg ACCELERATOR=cuda --tag vavae .
#   docker run --gpus=all --volume "$PWD/runs:/vavae/runs" vavae vavae run
FROM python:3.12-slim
# cpu, cuda or tpu
ARG ACCELERATOR=cpu
ENV ACCELERATOR=$ACCELERATOR PIP_NO_CACHE_DIR=1
WORKDIR /vavae
COPY . .
RUN bash -euc '. launch/environment.sh; prepare_environment gcs'
ENV PATH=/vavae/.venv/bin:$PATH
CMD ["vavae", "--help"]
