#!/usr/bin/env bash
# Install softvllm into its own virtual environment: .venv, vLLM for the CPU, trainer, test tools.
#
#   scripts/install.sh                what `make install` runs
#   EXTRA=cuda,trainer scripts/install.sh    vLLM for NVIDIA GPUs
#   EXTRA=cpu ...                            without the trainer's packages
#   PYTHON=python3.12 VENV=path/to/env ...
#
# A finished install leaves a stamp in the environment, so that calling this again costs nothing
# and keeps the extras. It installs again when pyproject.toml, the constraints or this script change.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=${VENV:-.venv}
stamp=$VENV/.softvllm-install # line 1: the extras; lines 2 and 3: sums of what they came from
have=$(cat "$stamp" 2>/dev/null || true)
have_extra=$(sed -n 1p <<<"$have")
have_base=$(sed -n 2p <<<"$have")
EXTRA=${EXTRA:-${have_extra:-cpu,trainer}} # once installed with EXTRA=cuda, plain `make test` keeps it
# PyTorch's own index of CPU builds, or your mirror of it.
TORCH_CPU_INDEX=${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}

say() { printf 'install: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

case ",${EXTRA//,/,,}," in # commas doubled, so that ",cpu,,cuda," matches as two words
    *,cpu,*,cuda,* | *,cuda,*,cpu,*) die "EXTRA=$EXTRA: cpu and cuda exclude each other" ;;
    *,cuda,*) flavour=cuda constraints=constraints.txt ;;
    *,cpu,*) flavour=cpu constraints=constraints-cpu.txt ;;
    *) die "EXTRA=$EXTRA: name a flavour, cpu or cuda" ;;
esac

# ---- is there anything to do? ----------------------------------------------------------------
# Two sums: what decides vLLM and the versions around it, and what only decides our own package.
base_sum=$({ echo "$EXTRA"; sed -n '/^cpu = /p; /^cuda = /p; /^trainer = \[/,/^]/p' pyproject.toml
             cat constraints.txt constraints-cpu.txt; } | cksum)
own_sum=$(cat pyproject.toml scripts/install.sh | cksum)
want=$(printf '%s\n%s\n%s' "$EXTRA" "$base_sum" "$own_sum")
if [ "$have" = "$want" ] && [ -x "$VENV/bin/python" ]; then
    exit 0
fi
both=$have_extra,$EXTRA
case ",${both//,/,,}," in
    *,cpu,*,cuda,* | *,cuda,*,cpu,*)
        die "$VENV was installed with EXTRA=$have_extra; delete it, or set VENV to another folder" ;;
esac

# ---- Python and the environment --------------------------------------------------------------
supported() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

if [ ! -x "$VENV/bin/python" ]; then
    python=
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if supported "$candidate"; then
            python=$candidate
            break
        fi
    done
    if [ -z "$python" ]; then
        found=$("${PYTHON:-python3}" --version 2>/dev/null || echo "not a Python that runs")
        die "Python 3.11, 3.12 or 3.13 is needed (${PYTHON:-python3} is $found)." \
            "Install one, or name it: make install PYTHON=/path/to/python3.12"
    fi
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        die "$python has no venv module. On Debian and Ubuntu: apt install python3-venv"
    say "making $VENV with $("$python" --version)"
    "$python" -m venv "$VENV"
elif ! supported "$VENV/bin/python"; then
    die "$VENV was made with $("$VENV/bin/python" --version 2>&1), but Python 3.11, 3.12 or 3.13" \
        "is needed; delete $VENV and run this again"
fi
"$VENV/bin/python" -m pip --version >/dev/null 2>&1 || "$VENV/bin/python" -m ensurepip >/dev/null
echo "$EXTRA" >"$stamp" # without the sums: an interrupted install does not look finished

pip_install() {
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --progress-bar off "$@"
}

# ---- packages --------------------------------------------------------------------------------
if [ "$have_base" = "$base_sum" ]; then
    # Only our own package changed. Leaving the flavour's extra out keeps pip from fetching the
    # packages again that are removed below.
    say "updating softvllm"
    pip_install --constraint "$constraints" --editable ".[dev]"
else
    index=()
    if [ "$flavour" = cpu ] && [ "$(uname -s)" = Linux ]; then
        # On its own first, because a missing torch is easy to tell here and hard to read out of
        # a failed resolution of everything. PyPI itself carries no "+cpu" builds.
        torch=$(sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints-cpu.txt)
        say "installing $torch"
        if ! pip_install "$torch" --no-deps 2>/dev/null; then
            say "not in the configured package index; using $TORCH_CPU_INDEX"
            index=(--extra-index-url "$TORCH_CPU_INDEX")
            pip_install "$torch" --no-deps "${index[@]}" ||
                die "$torch was found neither in the configured package index nor there, see above." \
                    "Behind a proxy or with a mirror, set pip's PIP_* variables or TORCH_CPU_INDEX"
        fi
    fi
    say "installing softvllm[$EXTRA,dev]: about 190 packages, some minutes the first time"
    pip_install --constraint "$constraints" --editable ".[$EXTRA,dev]" "${index[@]}" ||
        die "pip failed, see above; nothing outside $VENV was changed, so it is safe to try again"
fi

# ---- the torchvision trap --------------------------------------------------------------------
# vLLM's packages ask for torchvision, torchaudio and torchcodec. Where an index offers only CUDA
# builds of these, they land beside a CPU torch and fail when imported; transformers then fails
# too ("operator torchvision::nms does not exist"), because it imports whichever is installed.
# Text models need none of the three, so a broken one is removed. `pip check` will mention it.
for package in torchvision torchaudio torchcodec; do
    if "$VENV/bin/python" -m pip show --quiet "$package" 2>/dev/null &&
        ! "$VENV/bin/python" -c "import $package" 2>/dev/null; then
        say "removing $package: it does not work with this torch, and text models do not need it"
        "$VENV/bin/python" -m pip uninstall --quiet --yes "$package"
    fi
done

say "checking that vLLM and transformers import"
"$VENV/bin/python" -c 'import transformers, vllm' >/dev/null 2>"$VENV/import.log" || {
    tail -n 20 "$VENV/import.log" >&2
    die "the packages are installed but do not import; the last lines are above"
}
rm -f "$VENV/import.log"

printf '%s\n' "$want" >"$stamp"
say "done: $VENV/bin/softvllm --help"
