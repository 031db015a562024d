use super::*;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::format::{Encoding, Kind as Samples, Range, Rgb};
use crate::sink::buffer_to_rgb;

fn request(name: &str, size: (u32, u32)) -> PatternRequest {
    PatternRequest {
        format: Format::parse(name).map(|(format, _)| format),
        size,
        rate: 1000.0,
        allocator: Some(Allocator::Plain),
        ..PatternRequest::default()
    }
}

fn started(name: &str, size: (u32, u32)) -> Pattern {
    let mut pattern = Pattern::new(&request(name, size)).unwrap();
    pattern.start().unwrap();
    pattern
}

/// Lets `ticks` pass, without waiting for them.
fn pass(pattern: &mut Pattern, ticks: u64) {
    let next = pattern.next.unwrap().at_ns;
    pattern.account(next + (ticks - 1) * pattern.period_ns);
}

fn take(pattern: &mut Pattern) -> Frame {
    if pattern.filled.is_empty() {
        pass(pattern, 1);
    }
    let filled = pattern.filled.pop_front().unwrap();
    pattern.take(filled).unwrap()
}

fn ready(pattern: &Pattern, timeout_ms: u8) -> bool {
    let mut fds = [PollFd::new(pattern.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::from(timeout_ms)).unwrap() == 1
}

struct Picture {
    width: u32,
    rgb: Vec<u8>,
}

impl Picture {
    fn of(buffer: &Buffer) -> Picture {
        Picture { width: buffer.layout().width(), rgb: buffer_to_rgb(buffer).unwrap() }
    }

    fn at(&self, x: u32, y: u32) -> Rgb {
        let start = (y * self.width + x) as usize * 3;
        Rgb::new(self.rgb[start], self.rgb[start + 1], self.rgb[start + 2])
    }

    fn is_white(&self, x: u32, y: u32) -> bool {
        self.at(x, y).g > 200
    }
}

/// Reads the number back from the picture, dot by dot.
fn number_in(picture: &Picture, card: &Card) -> u32 {
    let (left, top, scale) = card.number();
    let dots = |digit: u8, x: u32| {
        (0..font::ROWS).all(|row| {
            (0..font::CELL).all(|column| {
                let (x, y) = (x + column * scale + scale / 2, top + row * scale + scale / 2);
                picture.is_white(x, y) == font::dot(digit, column, row)
            })
        })
    };
    (0..card::DIGITS as u32).fold(0, |number, place| {
        let x = left + place * font::CELL * scale;
        let digit = (0..10).find(|&digit| dots(digit, x)).expect("a digit");
        number * 10 + u32::from(digit)
    })
}

/// The formats that it is drawn in.
fn drawn() -> impl Iterator<Item = Format> {
    Format::all().filter(|format| !matches!(format.kind(), Samples::Bayer { .. }))
}

#[test]
fn bars_have_their_colours_in_every_format() {
    let hd = Colour { encoding: Encoding::Bt709, range: Range::Full };
    for format in drawn() {
        for (size, colour) in [((322, 182), Colour::default()), ((131, 77), hd)] {
            let request = PatternRequest { format: Some(format), colour, ..request("XR24", size) };
            let mut pattern = Pattern::new(&request).unwrap();
            assert_eq!(pattern.layout().colour(), colour);
            pattern.start().unwrap();
            let picture = Picture::of(take(&mut pattern).buffer());
            for (i, bar) in (0u32..).zip(card::BARS) {
                let x = (2 * i + 1) * size.0 / 14;
                let limit = match format.kind() {
                    Samples::Rgb { channels, .. } if channels[0].width < 8 => (255u16 >> channels[0].width) as u8,
                    Samples::YuvWord { channels, .. } if channels[0].width < 8 => 36,
                    Samples::Hsv { .. } => 5,
                    Samples::Rgb { .. } => 0,
                    _ => 2,
                };
                let grey =
                    (0.299 * f64::from(bar.r) + 0.587 * f64::from(bar.g) + 0.114 * f64::from(bar.b)).round() as u8;
                let hd_grey =
                    (0.2126 * f64::from(bar.r) + 0.7152 * f64::from(bar.g) + 0.0722 * f64::from(bar.b)).round() as u8;
                let expected = match format.kind() {
                    Samples::Grey | Samples::DeepGrey { .. } if colour == hd => Rgb::new(hd_grey, hd_grey, hd_grey),
                    Samples::Grey | Samples::DeepGrey { .. } => Rgb::new(grey, grey, grey),
                    _ => bar,
                };
                for y in [0, 1, size.1 / 2, size.1 * 2 / 3 - 2] {
                    let got = picture.at(x, y);
                    let apart = [got.r.abs_diff(expected.r), got.g.abs_diff(expected.g), got.b.abs_diff(expected.b)];
                    assert!(apart.iter().all(|&apart| apart <= limit), "{format} bar {i}: {got:?}, not {expected:?}");
                }
            }
        }
    }
}

#[test]
fn each_frame_differs_and_says_its_number() {
    for format in drawn() {
        let mut pattern = started(&format.to_string(), MIN_SIZE);
        let mut last = Vec::new();
        for sequence in 0..9 {
            let frame = take(&mut pattern);
            assert_eq!(frame.meta().sequence, sequence);
            let picture = Picture::of(frame.buffer());
            assert_eq!(number_in(&picture, &pattern.card), sequence, "{format}");
            assert_ne!(picture.rgb, last, "{format}");
            last = picture.rgb;
            drop(frame);
            pattern.recycle().unwrap();
        }
    }
}

/// What a buffer showed before leaves no trace.
#[test]
fn a_buffer_used_again_is_like_a_new_one() {
    for name in ["XR24", "NV12", "YUYV", "RG24", "P010"] {
        let mut used = started(name, (640, 360));
        for sequence in [0, 99_999_999, 100_000_000, 7, 4_294_967_295, 12_345_678] {
            used.next.as_mut().unwrap().sequence = sequence;
            used.recycle().unwrap();
            used.queue.clear();
            used.queue.push_back(0);
            let frame = take(&mut used);
            let mut new = started(name, (640, 360));
            new.next.as_mut().unwrap().sequence = sequence;
            let other = Picture::of(take(&mut new).buffer());
            let picture = Picture::of(frame.buffer());
            assert_eq!(picture.rgb, other.rgb, "{name} {sequence}");
            assert_eq!(number_in(&picture, &used.card), sequence % 100_000_000);
            drop(frame);
        }
    }
}

#[test]
fn the_moving_block_stays_in_the_picture() {
    for width in [64, 65, 100, 641, 1920] {
        let mut pattern = started("GREY", (width, 48));
        for _ in 0..200 {
            let frame = take(&mut pattern);
            let picture = Picture::of(frame.buffer());
            let white = (0..width).filter(|&x| picture.is_white(x, 37)).count() as u32;
            assert_eq!(white, ((width / 10) & !1).max(8), "width {width}, frame {}", frame.meta().sequence);
            drop(frame);
            pattern.recycle().unwrap();
        }
    }
}

#[test]
fn ticks_without_a_free_slot_are_dropped_and_counted() {
    let mut pattern = started("XR24", MIN_SIZE);
    let held: Vec<_> = (0..4).map(|_| take(&mut pattern)).collect();
    assert_eq!(pattern.slots(), SlotCounts { dequeued: 4, ..SlotCounts::default() });
    assert!(pattern.stalled().line().contains("4 leased"), "{:?}", pattern.stalled());
    pass(&mut pattern, 3);
    assert_eq!((pattern.counts().dropped, pattern.filled.len()), (3, 0));
    drop(held);
    pattern.recycle().unwrap();
    pass(&mut pattern, 6);
    let sequences: Vec<_> = (0..4).map(|_| take(&mut pattern)).map(|frame| frame.meta().sequence).collect();
    assert_eq!(sequences, [7, 8, 9, 10], "the oldest are kept, as in a camera's queue");
    assert_eq!(pattern.counts().dropped, 5);
    pattern.recycle().unwrap();
    assert_eq!(take(&mut pattern).meta().sequence, 13);
}

#[test]
fn a_long_stop_is_a_gap_and_no_loop() {
    let mut pattern = started("XR24", MIN_SIZE);
    pattern.next.as_mut().unwrap().sequence = u32::MAX;
    pass(&mut pattern, 1 << 33);
    assert_eq!(pattern.counts().dropped, (1 << 33) - 4);
    let sequences: Vec<_> = (0..4).map(|_| take(&mut pattern)).map(|frame| frame.meta().sequence).collect();
    assert_eq!(sequences, [u32::MAX, 0, 1, 2]);
}

#[test]
fn it_keeps_time() {
    let mut pattern = started("XR24", MIN_SIZE);
    let mut stamps = Vec::new();
    while stamps.len() < 50 {
        assert!(ready(&pattern, 200));
        while let Some(frame) = pattern.try_next(Ready::FRAME).unwrap() {
            stamps.push((frame.meta().sequence, frame.meta().timestamp.us));
            assert_eq!(frame.meta().timestamp.clock, Clock::Monotonic);
            assert!(frame.meta().timestamp.us <= crate::clock::now_us());
        }
    }
    for pair in stamps.windows(2) {
        let ((first, early), (second, late)) = (pair[0], pair[1]);
        assert_eq!(late - early, u64::from(second - first) * 1000);
    }
}

/// A loop that takes one frame each time that it is woken must not fall behind for ever.
#[test]
fn it_stays_readable_while_there_are_frames() {
    let mut pattern = Pattern::new(&PatternRequest { rate: 1.0, ..request("XR24", MIN_SIZE) }).unwrap();
    pattern.start().unwrap();
    assert!(!ready(&pattern, 0));
    // As if 3.2 s had passed: three ticks, and 0.8 s to the next.
    pattern.next.as_mut().unwrap().at_ns -= 3_200_000_000;
    pattern.arm().unwrap();
    for sequence in 0..3 {
        assert!(ready(&pattern, 0));
        assert_eq!(pattern.try_next(Ready::FRAME).unwrap().unwrap().meta().sequence, sequence);
    }
    assert!(!ready(&pattern, 0));
}

#[test]
fn stopping_keeps_leased_frames_and_takes_the_others_back() {
    let mut pattern = started("XR24", MIN_SIZE);
    let frame = take(&mut pattern);
    pass(&mut pattern, 2);
    pattern.stop().unwrap();
    assert!(!ready(&pattern, 5));
    assert!(pattern.try_next(Ready::FRAME).unwrap().is_none());
    assert_eq!(pattern.slots(), SlotCounts { free: 3, dequeued: 1, ..SlotCounts::default() });
    assert_eq!(number_in(&Picture::of(frame.buffer()), &pattern.card), 0);
    pattern.start().unwrap();
    assert_eq!(pattern.slots().queued, 3);
    assert_eq!(take(&mut pattern).meta().sequence, 0);
    drop(pattern);
    assert_eq!(frame.buffer().layout().size(), MIN_SIZE, "a frame outlives its source");
}

#[test]
fn nonsense_is_refused_with_its_reason() {
    let good = request("XR24", MIN_SIZE);
    let bad = [
        (PatternRequest { size: (63, 48), ..good }, "at least 64x48"),
        (PatternRequest { size: (64, 47), ..good }, "at least 64x48"),
        (PatternRequest { size: (60_000, 60_000), ..good }, "4 GiB"),
        (PatternRequest { rate: 0.0, ..good }, "rate of 0"),
        (PatternRequest { rate: f64::NAN, ..good }, "rate of NaN"),
        (PatternRequest { rate: 1001.0, ..good }, "0.001 and 1000"),
        (PatternRequest { buffers: 0, ..good }, "1 to 64 buffers"),
        (PatternRequest { buffers: 65, ..good }, "1 to 64 buffers"),
    ];
    for (request, why) in bad {
        let error = Pattern::new(&request).unwrap_err();
        assert_eq!(error.kind(), Kind::Invalid);
        assert!(error.line().contains(why), "{error:?}");
    }
    for buffers in [1, 64] {
        assert_eq!(Pattern::new(&PatternRequest { buffers, ..good }).unwrap().buffers().len(), buffers as usize);
    }
}

#[test]
fn strides_are_aligned_as_asked() {
    let pattern = Pattern::new(&PatternRequest { align: 64, ..request("NV12", (642, 360)) }).unwrap();
    assert!(pattern.layout().planes().iter().all(|plane| plane.stride % 64 == 0), "{}", pattern.layout());
    let default = Pattern::new(&PatternRequest { allocator: None, ..PatternRequest::default() }).unwrap();
    assert_eq!(default.layout().to_string(), "XR24 640x360, stride 2560");
    assert_eq!(default.allocator(), Allocator::best());
}
