# The flow of questions and answers on a CPU, for a user without rights. Build it in the repository's folder:
#
#   docker build -f docker/question_answer.Dockerfile -t question-answer .
#   docker run -v "$PWD:/work" question-answer --data-path questions.json --model-id google/flan-t5-small
#
# Give `--user "$(id -u)"` as well where your user number is not 1000.
FROM python:3.11-slim-bookworm

# The program that draws the flow (--draw)
RUN apt-get update \
    && apt-get install -y --no-install-recommends graphviz \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /app

# torch first, from the index of its CPU builds: this layer is large and rarely changes
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY constraints.txt ./
RUN pip install --no-cache-dir --extra-index-url "$TORCH_INDEX" "$(grep '^torch==' constraints.txt)+cpu"

COPY pyproject.toml README.md LICENSE ./
COPY src ./src
RUN pip install --no-cache-dir --constraint constraints.txt ".[draw]"

RUN useradd --create-home --uid 1000 tunesmith \
    && mkdir /work \
    && chown tunesmith /work
USER tunesmith
WORKDIR /work

# Downloaded models lie beside your data, and are there for the next container.
ENV HF_HOME=/work/.huggingface

ENTRYPOINT ["python", "-m", "tunesmith.flows.question_answer"]
CMD ["--help"]
