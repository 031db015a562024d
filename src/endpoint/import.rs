//! What an importer makes of buffers, once for each.

use super::Refusal;
use crate::frame::{Buffer, WeakBuffer};

/// Makes a device's own image of a buffer's memory.
pub trait Importer {
    /// The device's image. It keeps the kernel's reference to the memory, not the frame's lease.
    type Image;

    /// What a person calls the importer.
    fn name(&self) -> &str;

    /// Imports a buffer. Borrows only.
    ///
    /// # Errors
    /// The refusal, with step, reason and repair.
    fn import(&mut self, buffer: &Buffer) -> Result<Self::Image, Refusal>;
}

/// Images by buffer: made once for each buffer, gone with the buffer.
///
/// Looking a buffer up compares addresses, and only for a handle not seen before the kernel's identities.
#[derive(Debug)]
pub struct ImportCache<I> {
    entries: Vec<(WeakBuffer, I)>,
    imports: u64,
}

impl<I> Default for ImportCache<I> {
    fn default() -> Self {
        ImportCache { entries: Vec::new(), imports: 0 }
    }
}

impl<I> ImportCache<I> {
    /// An empty cache.
    pub fn new() -> ImportCache<I> {
        ImportCache::default()
    }

    /// The image of `buffer`, imported now if it has none.
    ///
    /// # Errors
    /// The importer's refusal; nothing is cached then.
    pub fn get<P: Importer<Image = I>>(&mut self, importer: &mut P, buffer: &Buffer) -> Result<&I, Refusal> {
        let index = match self.find(buffer) {
            Some(index) => index,
            None => {
                self.entries.retain(|(weak, _)| !weak.is_gone());
                let image = importer.import(buffer)?;
                self.imports += 1;
                self.entries.push((buffer.downgrade(), image));
                self.entries.len() - 1
            }
        };
        Ok(&self.entries[index].1)
    }

    /// The image of a buffer that was imported before.
    pub fn peek(&self, buffer: &Buffer) -> Option<&I> {
        self.find(buffer).map(|index| &self.entries[index].1)
    }

    /// How many imports were made.
    pub fn imports(&self) -> u64 {
        self.imports
    }

    /// Takes all images out.
    pub(crate) fn take_all(&mut self) -> impl Iterator<Item = I> + '_ {
        self.entries.drain(..).map(|(_, image)| image)
    }

    /// Forgets all images.
    pub fn clear(&mut self) {
        self.entries.clear();
    }

    fn find(&self, buffer: &Buffer) -> Option<usize> {
        let known = self.entries.iter().position(|(weak, _)| weak.follows(buffer));
        known.or_else(|| {
            let same = |weak: &WeakBuffer| weak.upgrade().is_some_and(|other| other.same_memory(buffer));
            self.entries.iter().position(|(weak, _)| same(weak))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{Format, Layout};
    use crate::memory::Allocator;

    struct Counter(u32);

    impl Importer for Counter {
        type Image = u32;

        fn name(&self) -> &str {
            "counter"
        }

        fn import(&mut self, _: &Buffer) -> Result<u32, Refusal> {
            self.0 += 1;
            Ok(self.0)
        }
    }

    fn buffer() -> Buffer {
        let layout = Layout::packed(Format::parse("GREY").unwrap().0, (8, 8), 1).unwrap();
        Buffer::new(layout, vec![Allocator::Plain.allocate(64).unwrap()], &[64]).unwrap()
    }

    #[test]
    fn each_buffer_is_imported_once_and_forgotten_when_gone() {
        let (mut cache, mut importer) = (ImportCache::new(), Counter(0));
        let (first, second) = (buffer(), buffer());
        assert_eq!(*cache.get(&mut importer, &first).unwrap(), 1);
        assert_eq!(*cache.get(&mut importer, &first.clone()).unwrap(), 1);
        assert_eq!(*cache.get(&mut importer, &second).unwrap(), 2);
        assert_eq!(cache.imports(), 2);
        drop(first);
        assert_eq!(*cache.get(&mut importer, &buffer()).unwrap(), 3);
        assert_eq!(cache.entries.len(), 2, "the entry of the buffer that is gone went too");
        assert_eq!(cache.peek(&second), Some(&2));
    }
}
