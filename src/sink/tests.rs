use std::fs;
use std::io::{PipeReader, PipeWriter, Read, pipe};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use super::{Raw, Y4m};
use crate::endpoint::{JoinError, Ready, Rung, Sink, Source};
use crate::error::Kind;
use crate::format::Format;
use crate::frame::Frame;
use crate::memory::Allocator;
use crate::pattern::{Pattern, PatternRequest};

fn source(name: &str, align: u32, buffers: u32) -> Pattern {
    let request = PatternRequest {
        format: Format::parse(name).map(|(format, _)| format),
        size: (65, 49),
        rate: 1000.0,
        buffers,
        align,
        allocator: Some(Allocator::Plain),
        ..PatternRequest::default()
    };
    let mut source = Pattern::new(&request).unwrap();
    source.start().unwrap();
    source
}

fn next(source: &mut Pattern) -> Frame {
    loop {
        if let Some(frame) = source.try_next(Ready::FRAME).unwrap() {
            return frame;
        }
        thread::sleep(Duration::from_micros(200));
    }
}

/// The pixels of a frame, plane after plane.
fn pixels(frame: &Frame) -> Vec<u8> {
    let (layout, reader) = (*frame.buffer().layout(), frame.buffer().read().unwrap());
    let mut bytes = Vec::new();
    for plane in 0..layout.format().planes() {
        let mut row = vec![0; layout.format().row_bytes(plane, layout.width()) as usize];
        for y in 0..layout.format().rows(plane, layout.height()) {
            reader.row(plane, y, &mut row);
            bytes.extend_from_slice(&row);
        }
    }
    bytes
}

/// A pipe, and the name under which it can be opened again.
fn named_pipe() -> (PipeReader, PipeWriter, PathBuf) {
    let (reader, writer) = pipe().unwrap();
    let name = PathBuf::from(format!("/proc/self/fd/{}", writer.as_raw_fd()));
    (reader, writer, name)
}

#[test]
fn a_pipe_gets_the_pixels_without_a_copy() {
    for (format, align) in [("XR24", 1), ("XR24", 256), ("NV12", 256), ("YU12", 1)] {
        let mut source = source(format, align, 4);
        let (mut reader, writer, name) = named_pipe();
        let mut sink = Raw::new(name);
        assert_eq!(sink.join(source.layout(), None, source.buffers()).unwrap(), Rung::Exported);
        drop(writer);
        let read = thread::spawn(move || {
            let mut all = Vec::new();
            reader.read_to_end(&mut all).map(|_| all).unwrap()
        });
        let mut expected = Vec::new();
        for _ in 0..20 {
            let frame = next(&mut source);
            expected.extend(pixels(&frame));
            sink.present(frame).unwrap();
            assert!(source.slots().dequeued <= 2, "{format}: two frames at most are kept from the source");
        }
        assert_eq!((sink.ledger().bytes(), sink.imports()), (0, 4));
        drop(sink);
        assert!(read.join().unwrap() == expected, "{format} {align}");
    }
}

#[test]
fn a_frame_is_held_until_it_is_read() {
    let mut source = source("GREY", 1, 4);
    let (mut reader, writer, name) = named_pipe();
    let mut sink = Raw::new(name);
    sink.join(source.layout(), None, source.buffers()).unwrap();
    drop(writer);
    let frame = next(&mut source);
    let (slot, expected) = (frame.slot(), pixels(&frame));
    sink.present(frame).unwrap();
    assert_eq!(source.slots().dequeued, 1);
    for _ in 0..3 {
        assert_ne!(next(&mut source).slot(), slot, "what is in the pipe is not filled again");
    }
    let mut read = vec![0; expected.len()];
    reader.read_exact(&mut read).unwrap();
    assert!(read == expected);
    sink.present(next(&mut source)).unwrap();
    assert_eq!(source.slots().dequeued, 1);
}

#[test]
fn files_and_copies_are_in_the_ledger() {
    let file = std::env::temp_dir().join(format!("dmaflow-raw-{}", std::process::id()));
    fs::write(&file, "something old and longer".repeat(10_000)).unwrap();
    let mut source = source("NV12", 256, 4);
    let (mut reader, writer, name) = named_pipe();
    let (mut raw, mut copy) = (Raw::new(&file), Raw::new(name).by_copy());
    for sink in [&mut raw, &mut copy] {
        assert_eq!(sink.join(source.layout(), None, source.buffers()).unwrap(), Rung::Copied);
    }
    drop(writer);
    let frame = next(&mut source);
    let expected = pixels(&frame);
    raw.present(frame.clone()).unwrap();
    copy.present(frame).unwrap();
    assert_eq!(source.slots().dequeued, 0);
    let mut read = vec![0; expected.len()];
    reader.read_exact(&mut read).unwrap();
    assert!(read == expected && fs::read(&file).unwrap() == expected);
    for (sink, cause) in [(&raw, Raw::INTO_FILE), (&copy, Raw::INTO_PIPE)] {
        let entry = &sink.ledger().entries()[0];
        assert_eq!((entry.cause, entry.count, entry.bytes), (cause, 1, expected.len() as u64));
    }
    fs::remove_file(file).unwrap();
}

#[test]
fn y4m_has_a_head_and_planes_in_its_order() {
    let mut source = source("YV12", 64, 4);
    let (mut reader, writer, name) = named_pipe();
    let mut sink = Y4m::new(name);
    sink.join(source.layout(), Some(25.0), source.buffers()).unwrap();
    drop(writer);
    let (luma, chroma) = (65 * 49, 33 * 25);
    let read = thread::spawn(move || {
        let mut all = vec![0; 61 + 2 * (6 + luma + 2 * chroma)];
        reader.read_exact(&mut all).map(|()| all).unwrap()
    });
    let mut expected = b"YUV4MPEG2 W65 H49 F25:1 Ip A0:0 C420jpeg XCOLORRANGE=LIMITED\n".to_vec();
    for _ in 0..2 {
        let frame = next(&mut source);
        let pixels = pixels(&frame);
        expected.extend_from_slice(b"FRAME\n");
        expected.extend_from_slice(&pixels[..luma]);
        expected.extend_from_slice(&pixels[luma + chroma..]);
        expected.extend_from_slice(&pixels[luma..luma + chroma]);
        sink.present(frame).unwrap();
    }
    assert!(read.join().unwrap() == expected);
    let other = self::source("XR24", 64, 4);
    let refused = sink.join(other.layout(), None, other.buffers());
    assert!(matches!(refused, Err(JoinError::Refused(refusal)) if refusal.why.contains("XR24")));
    let other = self::source("YU12", 64, 4);
    let refused = sink.join(other.layout(), None, other.buffers());
    assert!(matches!(refused, Err(JoinError::Failed(error)) if error.line().contains("in the middle of a stream")));
}

#[test]
fn too_few_buffers_are_copied() {
    let source = source("GREY", 1, 2);
    let (_reader, _writer, name) = named_pipe();
    assert_eq!(Raw::new(name).join(source.layout(), None, source.buffers()).unwrap(), Rung::Copied);
}

#[test]
fn a_reader_that_goes_ends_the_stream() {
    for copy in [false, true] {
        let mut source = source("XR24", 1, 4);
        let (reader, writer, name) = named_pipe();
        let mut sink = if copy { Raw::new(name).by_copy() } else { Raw::new(name) };
        sink.join(source.layout(), None, source.buffers()).unwrap();
        drop((reader, writer));
        for _ in 0..2 {
            assert_eq!(sink.present(next(&mut source)).unwrap_err().kind(), Kind::Ended);
        }
        assert_eq!(sink.finish().unwrap(), None);
        assert_eq!(sink.ledger().bytes(), 0);
    }
}

#[test]
fn an_order_to_stop_ends_the_wait_for_a_reader() {
    for copy in [false, true] {
        let mut source = source("XR24", 1, 4);
        let (_reader, _writer, name) = named_pipe();
        let (stop, mut order) = pipe().unwrap();
        let sink = Raw::new(name).stop_at(OwnedFd::from(stop));
        let mut sink = if copy { sink.by_copy() } else { sink };
        sink.join(source.layout(), None, source.buffers()).unwrap();
        let start = Instant::now();
        let stopper = thread::spawn(move || {
            thread::sleep(Duration::from_millis(50));
            std::io::Write::write_all(&mut order, b"x").map(|()| order).unwrap()
        });
        // Nobody reads: some have room, the next has not.
        let ended = (0..20).find_map(|_| sink.present(next(&mut source)).err()).unwrap();
        assert_eq!(ended.kind(), Kind::Ended);
        assert!(start.elapsed() > Duration::from_secs(1) && start.elapsed() < Duration::from_secs(20));
        drop(stopper.join().unwrap());
    }
}
