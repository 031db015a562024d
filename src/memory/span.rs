//! Bytes that others may write meanwhile: where they are, and how they are copied.

use std::marker::PhantomData;
use std::ptr::NonNull;

/// So many bytes at an address, to read by copying them out. A device or another process may write them at any time, so there is
/// never a reference to them. Cheap to copy.
#[derive(Clone, Copy, Debug)]
pub struct Span<'a> {
    start: NonNull<u8>,
    len: usize,
    memory: PhantomData<&'a ()>,
}

// SAFETY: it is an address and a length. Reading there is sound from any thread (`Span::new`).
unsafe impl Send for Span<'_> {}
// SAFETY: as above.
unsafe impl Sync for Span<'_> {}

impl<'a> Span<'a> {
    /// No bytes.
    pub const EMPTY: Span<'static> = Span { start: NonNull::dangling(), len: 0, memory: PhantomData };

    /// The `len` bytes from `start` on.
    ///
    /// # Safety
    /// They must be mapped readable for the whole of `'a`, and no reference that allows writing them may exist in it. That they
    /// change meanwhile, written by a device or through another mapping, is allowed.
    pub const unsafe fn new(start: NonNull<u8>, len: usize) -> Span<'a> {
        Span { start, len, memory: PhantomData }
    }

    /// Length in bytes.
    pub const fn len(self) -> usize {
        self.len
    }

    /// Whether there is nothing.
    pub const fn is_empty(self) -> bool {
        self.len == 0
    }

    /// The first byte's address, for system calls that read from there.
    pub const fn as_ptr(self) -> *const u8 {
        self.start.as_ptr()
    }

    /// The `len` bytes from `offset` on; `None` if they are not all inside.
    pub fn part(self, offset: usize, len: usize) -> Option<Span<'a>> {
        if offset.checked_add(len)? > self.len {
            return None;
        }
        // SAFETY: `offset` is at most the length (checked), so that the address is inside the same memory or right behind it.
        let start = unsafe { self.start.add(offset) };
        Some(Span { start, len, memory: PhantomData })
    }

    /// Copies bytes out, from `offset` on. Bytes past the end are zero in `out`.
    pub fn read(self, offset: usize, out: &mut [u8]) {
        let there = self.len.saturating_sub(offset).min(out.len());
        let (inside, outside) = out.split_at_mut(there);
        if there > 0 {
            // SAFETY: `offset + there` is at most the length, readable for `'a`; `inside` is borrowed exclusively, so it cannot be
            // a part of memory that others may write.
            unsafe { copy(self.start.add(offset), NonNull::from(inside).cast(), there) };
        }
        outside.fill(0);
    }
}

/// The most that is copied at once. From about this length on the C library leaves the vector loop for `rep movsb` on processors that
/// call that fast; the loop was not slower in any length tried, and on some processors and in emulators is several times as fast.
const PIECE: usize = 2048;

/// Copies `len` bytes.
///
/// # Safety
/// `from` must be readable and `to` writable for `len` bytes, and they must not overlap.
pub(super) unsafe fn copy(from: NonNull<u8>, to: NonNull<u8>, len: usize) {
    let mut done = 0;
    while done < len {
        let piece = (len - done).min(PIECE);
        // SAFETY: `done + piece` is at most `len`, for which the caller vouches.
        unsafe { to.add(done).copy_from_nonoverlapping(from.add(done), piece) };
        done += piece;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_outside_is_read() {
        let bytes: Vec<u8> = (0..=255).cycle().take(5000).collect();
        // SAFETY: the bytes outlive the span and nobody writes them.
        let span = unsafe { Span::new(NonNull::from(&bytes[..]).cast(), bytes.len()) };
        let mut out = vec![9; 4100];
        span.read(1000, &mut out);
        assert!(out[..4000] == bytes[1000..] && out[4000..] == [0; 100]);
        span.read(usize::MAX, &mut out);
        assert_eq!(out, [0; 4100]);
        assert!(span.part(4000, 1001).is_none() && span.part(usize::MAX, 2).is_none());
        let part = span.part(4990, 10).unwrap();
        part.part(2, 8).unwrap().read(0, &mut out[..8]);
        assert_eq!(out[..8], bytes[4992..]);
        assert!(span.part(5000, 0).unwrap().is_empty());
    }
}
