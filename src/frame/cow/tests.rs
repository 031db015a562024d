use proptest::prelude::*;

use super::*;
use crate::format::{Format, PlaneLayout};
use crate::frame::{Buffer, Slots, SlotsArc};
use crate::memory::{Access, Allocator, page_size};

const PAGES: usize = 5;

fn grey() -> Layout {
    // A row is a page.
    let size = (page_size() as u32, PAGES as u32);
    Layout::packed(Format::parse("GREY").unwrap().0, size, 1).unwrap()
}

/// A queue over plain memory: its slots, and a frame of slot 0 whose row y is full of y + 1.
fn queue(count: u32) -> (SlotsArc, Frame) {
    let slots = Slots::new(count);
    slots.take_free().for_each(|slot| slot.queued());
    let buffer = Buffer::allocate(Allocator::Plain, &grey(), &crate::frame::Room::default()).unwrap();
    let mut memory = buffer.map(Access::ReadWrite).unwrap();
    for row in 0..PAGES {
        memory[0].write(row * page_size(), &vec![row as u8 + 1; page_size()]);
    }
    let lease = Slots::dequeued(&slots, 0).unwrap();
    (slots, Frame::new(buffer, FrameMeta::default(), lease))
}

fn first_bytes(view: &CowView) -> Vec<u8> {
    let mut byte = [0];
    (0..PAGES as u32)
        .map(|row| {
            view.row(0, row, &mut byte).unwrap();
            byte[0]
        })
        .collect()
}

#[test]
fn a_detached_view_keeps_its_bytes_and_gives_the_slot_back() {
    for addressed in [false, true] {
        let (slots, frame) = queue(2);
        let mut view = frame.view("test").unwrap();
        let address = addressed.then(|| view.as_ptr(0));
        assert_eq!(view.write(0, 2, 0, &[77]), Ok(1));
        let mut device = frame.buffer().map(Access::ReadWrite).unwrap();
        assert!(!slots.detach_oldest_view(), "the frame is held as well");
        drop(frame);
        assert_eq!((view.pages(), slots.queued()), (ViewPages::Device, 1));
        assert!(slots.detach_oldest_view());
        assert_eq!((view.pages(), slots.counts().free), (ViewPages::Detached, 1));
        assert!(slots.views().is_empty() && !slots.detach_oldest_view());
        device[0].write(0, &vec![99; PAGES * page_size()]);
        assert_eq!(first_bytes(&view), [1, 2, 77, 4, 5]);
        assert!(address.is_none_or(|address| address == view.as_ptr(0)));
        assert_eq!(view.write(0, 0, 0, &[55]), Ok(1));
        assert_eq!(first_bytes(&view), [55, 2, 77, 4, 5]);
        assert_eq!(view.copied_pages().unwrap(), PAGES as u64);
        let copies: Vec<_> = view.copies().into_iter().map(|entry| (entry.count, entry.bytes)).collect();
        assert_eq!(copies, [(1, page_size() as u64), (1, (PAGES * page_size()) as u64)]);
        assert_eq!(slots.views().copies(), view.copies());
    }
}

/// It would be a copy for nothing.
#[test]
fn a_view_of_a_slot_behind_a_fence_is_not_detached() {
    let (slots, frame) = queue(2);
    let view = frame.view("test").unwrap();
    let (read, end) = nix::unistd::pipe().unwrap();
    frame.release_after(crate::fence::SyncFile::from(read));
    drop(frame);
    assert!(!slots.detach_oldest_view());
    assert_eq!(view.pages(), ViewPages::Device);
    nix::unistd::write(&end, b"x").unwrap();
    assert!(slots.detach_oldest_view() && slots.counts().free == 1);
}

#[test]
fn a_view_that_is_written_to_is_not_detached() {
    let (slots, frame) = queue(1);
    let mut view = frame.view("test").unwrap();
    drop(frame);
    let raw = view.raw();
    assert!(!slots.detach_oldest_view());
    drop(raw);
    assert!(slots.detach_oldest_view());
}

#[test]
fn mappings_are_used_again_and_show_nothing_that_was_written() {
    let (slots, frame) = queue(1);
    let mut view = frame.view("first").unwrap();
    let address = view.as_ptr(0);
    view.write(0, 1, 5, &[9; 3]).unwrap();
    drop(view);
    let view = frame.view("second").unwrap();
    assert_eq!(view.as_ptr(0), address);
    let mut row = [0; 10];
    view.row(0, 1, &mut row).unwrap();
    assert_eq!(row, [2; 10]);
    assert_eq!(slots.views().copies()[0].count, 1);
    assert_eq!(slots.views().infos()[0].holder, "second");
    assert!(slots.views().infos()[0].to_string().starts_with("slot 0 by second (process "));
}

#[test]
fn the_slot_with_the_oldest_view_goes_first() {
    let (slots, first) = queue(2);
    let second = Slots::dequeued(&slots, 1).unwrap();
    let second = Frame::new(first.buffer().clone(), FrameMeta::default(), second);
    let younger = [second.view("a").unwrap(), second.view("b").unwrap()];
    std::thread::sleep(std::time::Duration::from_millis(1));
    let youngest = first.view("c").unwrap();
    drop((first, second));
    assert!(slots.detach_oldest_view());
    assert!(younger.iter().all(|view| view.pages() == ViewPages::Detached));
    assert_eq!(youngest.pages(), ViewPages::Device);
    assert!(slots.detach_oldest_view() && youngest.pages() == ViewPages::Detached);
}

proptest! {
    /// Whatever the layout, nothing outside the memory is touched, and what is read is what was written.
    #[test]
    fn hostile_layouts_and_places(
        index in 0..Format::all().len(),
        size in (1u32..100, 1u32..100),
        places in prop::collection::vec((0u32..3, 0u32..70000, 0u32..70000), 4),
        lens in prop::collection::vec(1usize..20000, 1..4),
        at in (0usize..6, any::<u32>(), any::<u32>()),
        near in (0u32..100, 0u32..1000),
        detach: bool,
    ) {
        let format = Format::all().nth(index).unwrap();
        let places: Vec<_> = places
            .into_iter()
            .map(|(memory, offset, stride)| PlaneLayout { memory, offset, stride })
            .take(format.planes())
            .collect();
        let Ok(layout) = Layout::new(format, size, &places) else { return Ok(()) };
        let memory = lens.iter().map(|&len| Allocator::Plain.allocate(len)).collect::<Result<Vec<_>>>().unwrap();
        let Ok(buffer) = Buffer::new(layout, memory, &lens) else { return Ok(()) };
        let slots = Slots::new(1);
        slots.take_free().for_each(|slot| slot.queued());
        let frame = Frame::new(buffer, FrameMeta::default(), Slots::dequeued(&slots, 0).unwrap());
        let mut view = frame.view("test").unwrap();
        if detach {
            view.detach().unwrap();
        }
        let mut out = [7; 40];
        for (plane, row, offset) in [at, (at.0 % 4, near.0, near.1)] {
            view.row(plane, row, &mut out).unwrap();
            view.read(plane, offset as usize, &mut out).unwrap();
            let written = view.write(plane, row, offset, &[0xa5; 32]).unwrap();
            prop_assert!(written <= 32);
            let mut all = vec![0; offset.min(70000) as usize + 32];
            view.row(plane, row, &mut all).unwrap();
            let seen = all[offset.min(70000) as usize..].iter().take_while(|&&byte| byte == 0xa5).count();
            prop_assert!(written == 0 || seen >= written, "{seen} of {written}");
        }
        frame.buffer().read().unwrap().row(at.0, near.0, &mut out);
        prop_assert!(out.iter().all(|&byte| byte == 0), "the frame changed");
    }

    /// More than the memory has is refused, by the plane's number.
    #[test]
    fn lengths_past_the_memory_are_refused(more in 1usize..=usize::MAX - 4096) {
        let layout = grey();
        let memory = vec![Allocator::Plain.allocate(layout.memory_len(0)).unwrap()];
        let error = Buffer::new(layout, memory, &[layout.memory_len(0).saturating_add(more)]).unwrap_err();
        prop_assert!(error.kind() == Kind::Invalid && error.line().contains("memory plane 0"), "{:?}", error);
    }
}
