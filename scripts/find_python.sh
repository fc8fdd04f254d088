#!/bin/sh
# Prints the first usable interpreter of the versions asked for, in that order.
#
#   sh scripts/find_python.sh 3.12 3.11 3.10
#
# A version is looked for on PATH, then in pyenv, then in uv. Usable means that it runs, is of that
# version and can make virtual environments; an entry of pyenv on PATH may do none of these.

usable() { # usable VERSION COMMAND
  "$2" -c "import sys, venv, ensurepip; sys.exit('%d.%d' % sys.version_info[:2] != '$1')" \
    >/dev/null 2>&1
}

candidates() { # candidates VERSION: one command per line, the likeliest first
  echo "python$1"
  echo python3
  for root in "$PYENV_ROOT" "$HOME/.pyenv"; do
    [ -d "$root/versions" ] && ls -d "$root/versions/$1".*/bin/"python$1" 2>/dev/null | sort -rV
  done
  command -v uv >/dev/null 2>&1 && uv python find --offline "$1" 2>/dev/null
}

for version in "$@"; do
  found=$(candidates "$version" | while read -r command; do
    if usable "$version" "$command"; then
      command -v "$command"
      break
    fi
  done)
  if [ -n "$found" ]; then
    echo "$found"
    exit 0
  fi
done
echo "no Python of version $* with venv was found (on PATH, in pyenv, in uv); install one" >&2
exit 1
