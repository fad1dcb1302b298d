// Memory of big CPU tensors in huge pages.
//
// A fresh tensor's memory is mapped when it is first written, page by page: for 100 MB in pages of
// 4 KiB that takes several times the copy into it; in pages of 2 MiB, a fraction.
#pragma once

#include <c10/core/Allocator.h>

#include <cstddef>

namespace qtoolkit::ops {

// Tensors from this size on are worth it.
inline constexpr size_t kHugePageBytes = size_t{2} << 20;
inline constexpr size_t kHugeTensorBytes = 2 * kHugePageBytes;

// Asks the system for huge pages for memory that starts at one; without effect where it has none.
void advise_huge_pages(void* memory, size_t bytes);

// Moves memory that is in use, such as the weights that every call of an operator reads, to huge
// pages, at the first call for it: 20 ms for 10 MB. It stays where it is, and holds what it held.
// Without effect below kHugeTensorBytes, and where the system does not do that (before Linux 6.1,
// files).
void move_to_huge_pages(const void* memory, size_t bytes);

// PyTorch's CPU allocator, from which blocks of kHugeTensorBytes and more come aligned to huge
// pages, which the system is asked to use (where it knows them). Smaller blocks are as ever.
c10::Allocator* huge_page_allocator();

}  // namespace qtoolkit::ops
