# tiltflow on a CPU, with the exact set of constraints.txt:
#   docker build -t tiltflow .
#   docker run --rm -v "$PWD/runs:/app/runs" tiltflow train digits-even --output runs/demo
# The user inside has the number 1000; the folder that is mounted must be one that it can write to.
FROM python:3.12-slim AS build
WORKDIR /source
RUN python -m venv /opt/tiltflow
ENV PATH=/opt/tiltflow/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# The largest part is a layer of its own, which a change of the sources leaves alone.
COPY constraints.txt ./
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu "torch==$(sed -n 's/^torch==//p' constraints.txt)"
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir --constraint constraints.txt ./ ./src/tiltflow_assets

FROM python:3.12-slim
RUN useradd --uid 1000 --create-home tiltflow && install -d -o tiltflow /app
COPY --from=build /opt/tiltflow /opt/tiltflow
ENV PATH=/opt/tiltflow/bin:$PATH
USER 1000
WORKDIR /app
ENTRYPOINT ["tiltflow"]
CMD ["--help"]
