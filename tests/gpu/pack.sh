#!/usr/bin/env bash
# `make gpu-kit` calls it: packs build-gpu/kit.tar.xz, all that a first run on a GPU needs, for a machine that may have
# neither a compiler nor this project's libraries. There:
#
#   tar -xf kit.tar.xz && bash kit/tests/gpu/first_run.sh
#
# The kit is the tracked files, the programs `make gpu-kit` built (bin/), and the libraries they load (lib/) but for glibc,
# the compiler's and CUDA's own. That machine brings a driver, cuBLAS (CUDA's or PyTorch's) and, for the rivals, PyTorch.
set -euo pipefail
cd "$(dirname "$0")/../.."
build=build-gpu kit=build-gpu/kit
rm -rf "$kit"
mkdir -p "$kit/bin" "$kit/lib"
git ls-files -z ':!docs' | tar -cf - --null -T - | tar -xf - -C "$kit"
git describe --always --dirty >"$kit/commit"
cp "$build"/kit-bin/{speed,tests,times} "$kit/bin/"
strip "$kit"/bin/*
ldd "$kit"/bin/* | awk '$3 ~ /^\// {print $1, $3}' | sort -u | while read -r name path; do
  case $name in
    libc.so*|libm.so*|libdl.so*|librt.so*|libpthread.so*|libstdc++.so*|libgcc_s.so*|libcu*|libnv*) ;;
    *) cp -L "$path" "$kit/lib/$name" ;;
  esac
done
newest() { objdump -T "$kit"/bin/* "$kit"/lib/* 2>/dev/null | grep -oE "$1_[0-9.]+" | sort -uV | tail -n1; }
echo "$(newest GLIBC) $(newest GLIBCXX)" >"$kit/needs"
tar -C "$build" -cf - --owner=0 --group=0 kit | xz -T2 -3 >"$build/kit.tar.xz.new"
mv "$build/kit.tar.xz.new" "$build/kit.tar.xz"
echo "gpu-kit: $build/kit.tar.xz, $(du -m "$build/kit.tar.xz" | cut -f1) MiB; needs $(cat "$kit/needs")"
