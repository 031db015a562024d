//! What a thread takes of the heap: whoever sends messages must not decide how much that is.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// Counts for each thread by itself: other tests of this program run beside.
struct Counting;

thread_local! {
    /// Bytes that this thread has allocated, less those that it has freed, whoever had allocated them.
    static HELD: Cell<isize> = const { Cell::new(0) };
    /// The most of them since that was set back.
    static MOST: Cell<isize> = const { Cell::new(0) };
}

/// No layout has more than `isize::MAX` bytes.
fn more(bytes: usize) {
    let held = HELD.get().wrapping_add_unsigned(bytes);
    HELD.set(held);
    MOST.set(MOST.get().max(held));
}

fn less(bytes: usize) {
    HELD.set(HELD.get().wrapping_sub_unsigned(bytes));
}

/// The most bytes that this thread has held at a time of what it has allocated in `what`.
pub(in super::super) fn most<R>(what: impl FnOnce() -> R) -> (R, usize) {
    let before = HELD.get();
    MOST.set(before);
    let result = what();
    (result, MOST.get().wrapping_sub(before).unsigned_abs())
}

// SAFETY: every call goes to the system's allocator as it came. The counters allocate nothing: they are initialized when a thread begins,
// and have nothing to drop.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        more(layout.size());
        // SAFETY: the caller's promise is the one that `System` asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        more(layout.size());
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // Both are there for a moment.
        more(size);
        less(layout.size());
        // SAFETY: as above.
        unsafe { System.realloc(at, layout, size) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        less(layout.size());
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// A counter that counts nothing would pass every test.
#[test]
fn the_counter_counts() {
    let (kept, one) = most(|| std::hint::black_box(vec![0_u8; 1000]));
    let ((), two) = most(|| (0..3).for_each(|_| drop(std::hint::black_box(vec![0_u8; 100]))));
    let ((), none) = most(|| drop(kept));
    assert_eq!((one, two, none), (1000, 100, 0));
}
