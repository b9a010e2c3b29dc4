#include "row_work.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "threads.h"

namespace graphwright {
namespace {

// Values in a piece: with fewer, waking a thread takes longer than the work.
constexpr std::size_t kPiece = 16384;

// Calls work(begin, end) for pieces of `count` rows that together are all of them.
template <typename Work>
void in_pieces(std::size_t count, std::size_t columns, std::size_t threads, const Work& work) {
  const std::size_t piece = std::max<std::size_t>(1, kPiece / std::max<std::size_t>(1, columns));
  parallel_for((count + piece - 1) / piece, threads, [&](std::size_t index) {
    work(index * piece, std::min(count, index * piece + piece));
  });
}

// Calls work(place, row) for every index that is in the table; the place of the first that is not.
template <typename Work>
std::size_t look_up(const std::int64_t* indices, std::size_t count, std::size_t table_rows, std::size_t columns,
                    std::size_t threads, const Work& work) {
  std::atomic<std::size_t> wrong{kAllFound};
  in_pieces(count, columns, threads, [&](std::size_t begin, std::size_t end) {
    for (std::size_t place = begin; place < end; ++place) {
      // Read once: another thread of the program may write while this one looks.
      const std::int64_t index = *static_cast<const volatile std::int64_t*>(indices + place);
      if (index >= 0 && static_cast<std::uint64_t>(index) < table_rows) {
        work(place, static_cast<std::size_t>(index));
        continue;
      }
      std::size_t before = wrong.load();
      while (place < before && !wrong.compare_exchange_weak(before, place)) {
      }
    }
  });
  return wrong.load();
}

bool together(std::ptrdiff_t stride, std::size_t columns) { return stride == static_cast<std::ptrdiff_t>(columns); }

}  // namespace

void run_norm(void (*kernel)(const Norm&, std::size_t, std::size_t), const Norm& norm, std::size_t rows,
              std::size_t threads) {
  in_pieces(rows, norm.columns, threads, [&](std::size_t begin, std::size_t end) { kernel(norm, begin, end); });
}

void run_pointwise(const RowKernels& kernels, Pointwise work, std::size_t rows, std::size_t threads) {
  const bool two = work.other.data != nullptr;
  if (together(work.x.stride, work.columns) && together(work.y.stride, work.columns) &&
      work.shared == 0 && (!two || work.one || together(work.other.stride, work.columns))) {
    work.columns *= rows;
    rows = 1;
  }
  if (rows != 1) {
    in_pieces(rows, work.columns, threads,
              [&](std::size_t begin, std::size_t end) { kernels.pointwise(work, begin, end); });
    return;
  }
  in_pieces(work.columns, 1, threads, [&](std::size_t begin, std::size_t end) {
    Pointwise part = work;
    part.x.data += begin;
    part.y.data += begin;
    if (two && !work.one) part.other.data += begin;
    part.columns = end - begin;
    kernels.pointwise(part, 0, 1);
  });
}

void run_rotary(const RowKernels& kernels, const Rotary& work, std::size_t batch, std::size_t threads) {
  in_pieces(batch * work.heads * work.positions, work.width, threads,
            [&](std::size_t begin, std::size_t end) { kernels.rotary(work, begin, end); });
}

std::size_t copy_rows(const std::uint8_t* table, std::size_t table_rows, std::size_t bytes, const std::int64_t* indices,
                      std::size_t count, std::uint8_t* y, std::size_t threads) {
  return look_up(indices, count, table_rows, bytes / sizeof(float), threads, [&](std::size_t place, std::size_t row) {
    if (bytes != 0) std::memcpy(y + place * bytes, table + row * bytes, bytes);
  });
}

std::size_t unpack_rows(const RowKernels& kernels, const PackedTable& table, const std::int64_t* indices,
                        std::size_t count, float* y, std::size_t threads) {
  const std::size_t columns = table.first.columns;
  const std::size_t row_bytes = table.groups * table.first.group * static_cast<std::size_t>(table.first.bits) / 8;
  return look_up(indices, count, table.rows, columns, threads, [&](std::size_t place, std::size_t row) {
    PackedRow here = table.first;
    here.codes += row * row_bytes;
    here.scales += row * table.groups;
    if (here.zeros != nullptr) here.zeros += row * table.groups;
    kernels.unpack_row(here, y + place * columns);
  });
}

}  // namespace graphwright
